"""Devices: mesh, placement of parameters and batches, collectives, processes. The only package that
names mesh axes.
"""
