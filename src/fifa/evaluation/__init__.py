"""EVALUATE: images of base and tuned models, what scorers and people say of them."""
