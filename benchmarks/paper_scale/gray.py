"""A task at paper scale: gray frames of 32 x 64 into an LSTM of 2,048, 33.6 million RNN parameters."""

from clips import Clips, ClipTask

_task = ClipTask(Clips(height=32, width=64, channels=1, noise=0.15, seed=12), hidden=2048)

model, calibration, training = _task.model, _task.calibration, _task.training
loss, evaluate = _task.loss, _task.evaluate
higher_is_better = True
