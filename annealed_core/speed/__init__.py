"""The same values and gradients in less time: many models in one, and steps that a compiler writes.

Nothing in the mathematics imports from here. What is fast has the call of what is plain, and one test holds all of it
to the plain chain; `bench/` says what each part earns.
"""
