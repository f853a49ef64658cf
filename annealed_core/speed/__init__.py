"""The same values and gradients in less time: what takes the place of a chain, a stack of models or a decoder.

Nothing in the mathematics imports from here. What is fast has the call of what is plain, and one test holds all of it
to the plain chain; `bench/` says what each part earns.
"""
