"""Feature inheritance: sampling runs that take or forecast features from earlier steps in place of computing.

From the inside out: `graph` is a UNet's forward pass as named values, `places` what of it can be inherited, `program`
the part of it that is left to compute, `passes` runs that; `forecast` and `corrections` say what stands in for a value;
`actions` is what one step may do, `modes` and `schedule` what all steps do; `run_plan` and `run` are one sampling run,
and `attach` puts runs under a diffusers pipeline.
"""
