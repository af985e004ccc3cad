"""A task at paper scale: frames of 120 x 160 x 3 into an LSTM of 256, 59.2 million RNN parameters."""

from clips import Clips, ClipTask

_task = ClipTask(Clips(height=120, width=160, channels=3, noise=0.1, seed=11), hidden=256)

model, calibration, training = _task.model, _task.calibration, _task.training
loss, evaluate = _task.loss, _task.evaluate
higher_is_better = True
