"""Attention: one function (`attend`), one description of who sees whom (`AttentionMask`), a file a
kernel.
"""

from mmjax.models.attention.attend import attend, choose, fuses
from mmjax.models.attention.mask import AttentionMask

__all__ = ["AttentionMask", "attend", "choose", "fuses"]
