"""Figures of the study, a module a stage, so that editing one re-runs only the stage that draws it."""
