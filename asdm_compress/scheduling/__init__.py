"""Finds a schedule of feature inheritance for a model, a sampler and a time budget, from measurements on the model.

In the order in which data flows: `menu` says what a step may do, `timing` what that costs, `responses` how the
prediction responds to older features, `gains` how far an error at a step moves the final latent; `surrogate` makes of
these what a schedule does, `step_costs` and `search` find the best ones for all times, `ways` are what can be sampled,
`rollouts` tries them on prompts, `goals` chooses, and `check_steps` compares predictions with what happens by step.
"""
