"""Who asks: API keys and tokens become a :class:`Caller`, on every route of every protocol."""

from aim_kserve.identity.caller import Caller, QosClass, Scope, current_caller, set_caller

__all__ = ["Caller", "QosClass", "Scope", "current_caller", "set_caller"]
