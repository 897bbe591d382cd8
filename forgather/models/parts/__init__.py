"""The pieces that models are composed of in YAML; copied as they are into every model package that uses them.

A copied part runs without Forgather, so a part imports torch, transformers and other parts, nothing else; a size it
cannot work with is a `ValueError`. Letters in tensor names are dimensions: B rows, L tokens (S of them keys), D hidden,
F intermediate, H query heads, K key/value heads, C channels of a head, V vocabulary.
"""
