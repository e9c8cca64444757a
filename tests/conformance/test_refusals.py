"""What a method cannot do on a backbone is said in one sentence, before anything is replaced."""

import pytest

from mmtune.backbones import backbone_of
from mmtune.conformance.backbones import build
from mmtune.conformance.methods import METHODS
from mmtune.tuners import registry

REFUSED = [(m, b, why) for m, case in METHODS.items() for b, why in case.refused.items()]


@pytest.mark.parametrize(("method", "backbone", "why"), REFUSED)
def test_refused_with_its_reason_and_the_model_untouched(method, backbone, why):
    case = METHODS[method]
    model = build(backbone)
    backbone_of(model).prepare()
    before = [(n, type(m)) for n, m in model.named_modules()]
    options = registry.method(case.method).options(**case.settings)
    with pytest.raises(ValueError, match=why):
        registry.apply(model, case.method, options)
    assert [(n, type(m)) for n, m in model.named_modules()] == before


def test_every_method_has_a_row():
    assert {case.method for case in METHODS.values()} == set(registry.methods())
