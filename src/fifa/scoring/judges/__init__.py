"""Vision-language models that are asked, over an endpoint, how good images are."""
