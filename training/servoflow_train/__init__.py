"""Trains the closed-loop proof policy: a pi0.5 network of 8 M parameters on ten Meta-World tasks, from pixels.

A tool for people who want to make or change that policy; the engine needs none of it.
"""
