import torch

from bilevel.problems.seeding import generator


def test_stream_is_a_function_of_its_parts():
    def draw(*parts):
        return torch.rand(4, generator=generator(*parts))

    assert torch.equal(draw(1, "a"), draw(1, "a"))
    for other in [(1, "b"), (2, "a"), (1,), (11, "a")]:
        assert not torch.equal(draw(1, "a"), draw(*other))
