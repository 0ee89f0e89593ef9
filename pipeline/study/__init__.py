"""The EDNL study: how accuracy falls with the number of non-linear layers, for several networks of one task.

Source: Ben Dror et al., "Layer Folding", BMVC 2022, section 4.1: the effective degree of non-linearity of a task is the
depth down to which all its networks can be linearised at no loss. A study is a grid of ordinary recipe runs.
"""
