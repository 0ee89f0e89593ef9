"""Refitting the layers behind a folded unit: it must bring the student nearer, however their values meet."""

import pytest
import torch
from test_folding_closed_form import IMAGES, Block, network
from torch import Tensor, nn

from pipeline.folding import closed_form_fold, closeness
from pipeline.folding.refit import Refit


def test_refitting_the_layers_behind_brings_the_logits_nearer() -> None:
    model = network(0.0, seed=1)
    plain, refitted = (
        closed_form_fold(model, ["1"], IMAGES, batch_size=8, refit=how, refit_ridge=1e-3) for how in ("none", "all")
    )
    assert plain.refitted == ()
    assert "3.layers.0" in refitted.refitted
    assert closeness(model, refitted.model, IMAGES).kl < closeness(model, plain.model, IMAGES).kl


class Joint(nn.Module):
    """Two convolutions that meet in a concatenation, a gate's product, or a sum of unlike shapes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.p, self.q = nn.Conv2d(10, 6, 1), nn.Conv2d(10, 1 if how == "spread" else 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "concatenation":
            return torch.cat([self.p(x), self.q(x)], 1)
        if self.how == "gate":
            return self.p(x) * self.q(x)
        return self.p(x) + self.q(x)


@pytest.mark.parametrize("joint", ["concatenation", "gate", "spread"])
@pytest.mark.parametrize("how", ["bias", "all"])
def test_layers_that_do_not_end_in_a_sum_are_refitted_to_their_own_values(joint: str, how: Refit) -> None:
    torch.manual_seed(0)
    wide = 12 if joint == "concatenation" else 6
    head = nn.Conv2d(wide, 5, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), Block(10, 0.0), Joint(joint), *head).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.5)  # else what the activations bend is too little to be seen
    plain, refitted = (
        closed_form_fold(model, ["1"], IMAGES, batch_size=8, refit=which, refit_ridge=1e-3) for which in ("none", how)
    )
    assert {"2.p", "2.q"} <= set(refitted.refitted)
    with torch.no_grad():
        errors = [float((result.model(IMAGES) - model(IMAGES)).square().mean()) for result in (plain, refitted)]
    assert errors[1] < errors[0]
