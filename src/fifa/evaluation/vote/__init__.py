"""People vote: a page with two images of one prompt, its results, and votes as feedback."""
