"""The names of ImageNet's classes in the order of a published network's logits."""

__all__ = ["imagenet_labels"]


def imagenet_labels() -> list[str]:
    """1000 names, such as ``"tench"``: the first of WordNet's synonyms, from the table that comes with timm."""
    from pipeline.models.torchvision_repair import repair

    repair()
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [str(info.index_to_description(index)).split(",")[0] for index in range(info.num_classes())]
