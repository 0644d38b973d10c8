"""Everything that learns: fine-tuning, reinforcement learning and evaluation of the models `medviz` serves."""
