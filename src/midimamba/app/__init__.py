"""`midimamba app`: a page in the browser on which musicians compose, train and listen.

The modules of the tabs import Gradio. What happens behind them does not: [`~midimamba.app.studio`] composes,
[`~midimamba.app.training_run`] trains, and [`~midimamba.app.workshop`] writes files.
"""
