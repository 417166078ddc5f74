"""Multi-UNet switching: one UNet with several members, of which every step of a sampling run uses another.

`sharing` finds what the members have in common, so that it is held once, and `ties` keeps it so; `schedules` says which
member does which step, `places` which step of which run a call is, and `switched_unet` is the UNet itself.
"""
