"""The miniature world: a renderer of small streets and the small networks trained on them."""
