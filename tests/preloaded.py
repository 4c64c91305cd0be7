"""What the server that tests fork sslctl from has imported and read: a fork of it begins to train in a tenth of a second.

It has never trained itself: a fork of a process that has would find autograd's threads gone.
"""

import contextlib
import io

import sklearn.linear_model  # noqa: F401
import timm  # noqa: F401
import torch._dynamo  # noqa: F401

import sslctl.commands.pretrain  # noqa: F401
import tests.own_methods  # noqa: F401
from sslctl.cli import main
from sslctl.data.sources import digits
from tests.runs import command

with contextlib.redirect_stdout(io.StringIO()):
    main([*command("run"), "--cfg", "job"])  # composes: YAML's and Hydra's own parsers are built
digits("train", 8)
