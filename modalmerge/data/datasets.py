"""The data sets: the embedded worlds, and the public sets that are prepared from their official files.

The numbers of rows and samples are those of the official releases. Where a number is one that no page or paper
confirmed, it is named in `unconfirmed`, and a set that differs from it gets a note, not a problem.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

EMBEDDED = "embedded"


@dataclass(frozen=True, kw_only=True)
class Known:
    """How large a split is known to be.

    Args:
        rows: images, or pairs of images; None where it is not known.
        samples: captions, questions or statements; None where it is not known.
        unconfirmed: which of the two, "rows" or "samples", nothing confirms.
    """

    rows: int | None = None
    samples: int | None = None
    unconfirmed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What is said of a data set.

    Args:
        summary: what it is, in one line.
        kind: what a row holds: captions, questions, statements, masks or labels; "embedded" for a world of scenes.
        tasks: names of the tasks that it is data for.
        needs: the official files, below the folder given as root; "" where none are needed.
        source: where the files and their paper are.
        licence: what their licence is said to allow; the set's own page is what counts.
        splits: what is known of each split's size.
    """

    summary: str
    kind: str
    tasks: tuple[str, ...]
    needs: str = ""
    source: str = ""
    licence: str = ""
    splits: Mapping[str, Known] = field(default_factory=dict)

    @property
    def is_public(self) -> bool:
        return self.kind != EMBEDDED


_ROWS, _SAMPLES = ("rows",), ("samples",)
_BOTH = (*_ROWS, *_SAMPLES)

DATASETS: Mapping[str, DataSet] = {
    "scenes": DataSet(
        summary="embedded world: pictures of 2 or 3 objects, with texts, pairs, masks and labels; no download",
        kind=EMBEDDED,
        tasks=("retrieval", "vqa", "nlvr2", "segmentation", "classification"),
    ),
    "postcards": DataSet(
        summary="second embedded domain: other backgrounds and other wording, for transfer; no download",
        kind=EMBEDDED,
        tasks=("retrieval",),
    ),
    "coco": DataSet(
        summary="COCO 2014 photographs with 5 or more captions each, in Karpathy's split",
        kind="captions",
        tasks=("retrieval",),
        needs="karpathy/dataset_coco.json, train2014/, val2014/",
        source="https://cocodataset.org; Karpathy and Fei-Fei 2015, arXiv 1412.2306",
        licence="annotations CC BY 4.0; photographs under Flickr's terms",
        splits={
            "train": Known(rows=82_783),
            "restval": Known(rows=30_504),
            "val": Known(rows=5_000, samples=25_010, unconfirmed=_SAMPLES),
            "test": Known(rows=5_000, samples=25_010, unconfirmed=_SAMPLES),
        },
    ),
    "flickr30k": DataSet(
        summary="Flickr photographs of people and animals with 5 captions each, in Karpathy's split",
        kind="captions",
        tasks=("retrieval",),
        needs="karpathy/dataset_flickr30k.json, flickr30k-images/",
        source="https://shannon.cs.illinois.edu/DenotationGraph; Young et al. 2014",
        licence="research only, by a form; photographs under Flickr's terms",
        splits={
            "train": Known(rows=29_000, samples=145_000, unconfirmed=_BOTH),
            "val": Known(rows=1_014, samples=5_070, unconfirmed=_BOTH),
            "test": Known(rows=1_000, samples=5_000, unconfirmed=_BOTH),
        },
    ),
    "visual_genome": DataSet(
        summary="photographs with about 50 phrases each, every one of a region; for pre-training",
        kind="captions",
        tasks=("retrieval",),
        needs="annotations/region_descriptions.json, images/VG_100K/, images/VG_100K_2/",
        source="https://homes.cs.washington.edu/~ranjay/visualgenome; Krishna et al. 2017, arXiv 1602.07332",
        licence="CC BY 4.0; photographs under Flickr's terms",
        splits={"train": Known(rows=108_077, unconfirmed=_ROWS)},
    ),
    "sbu": DataSet(
        summary="about a million Flickr photographs with the captions of their owners; for pre-training",
        kind="captions",
        tasks=("retrieval",),
        needs="annot.json, images_train/",
        source="https://www.cs.rice.edu/~vo9/sbucaptions; Ordonez et al. 2011",
        licence="captions for research; photographs under Flickr's terms",
        splits={"train": Known()},  # a million addresses; how many still answer changes by the year
    ),
    "cc3m": DataSet(
        summary="Conceptual Captions: web images with their cleaned alternative texts; for pre-training",
        kind="captions",
        tasks=("retrieval",),
        needs="train_annot.json with images_train/ (and val), or img2dataset's shards as *.tar, train/*.tar, val/*.tar",
        source="https://ai.google.com/research/ConceptualCaptions; Sharma et al. 2018",
        licence="captions freely usable with credit; images under their owners' terms",
        # of all addresses; what can be fetched is a tenth less and more, so that a difference is a note
        splits={
            "train": Known(rows=3_318_333, unconfirmed=_ROWS),
            "val": Known(rows=15_840, unconfirmed=_ROWS),
        },
    ),
    "vqav2": DataSet(
        summary="questions on COCO photographs, with ten answers of people to each",
        kind="questions",
        tasks=("vqa",),
        needs="v2_OpenEnded_mscoco_*_questions.json, v2_mscoco_*_annotations.json, train2014/, val2014/, test2015/",
        source="https://visualqa.org; Goyal et al. 2017, arXiv 1612.00837",
        licence="annotations CC BY 4.0; photographs under Flickr's terms",
        splits={
            "train": Known(rows=82_783, samples=443_757),
            "trainable_val": Known(rows=39_504),
            "rest_val": Known(rows=1_000),
            "test": Known(rows=81_434, samples=447_793),
            "test-dev": Known(rows=36_807, samples=107_394),
        },
    ),
    "nlvr2": DataSet(
        summary="pairs of web photographs with statements that are true or false of them",
        kind="statements",
        tasks=("nlvr2",),
        needs="nlvr2/data/{train,dev,test1}.json, images/train/, dev/, test1/",
        source="https://lil.nlp.cornell.edu/nlvr; Suhr et al. 2019, arXiv 1811.00491",
        licence="annotations CC BY 4.0; photographs under their owners' terms, by a form",
        splits={
            "train": Known(samples=86_373),
            "dev": Known(samples=6_982),
            "test1": Known(samples=6_967),
            "test2": Known(samples=6_970, unconfirmed=_SAMPLES),
        },
    ),
    "ade20k": DataSet(
        summary="scenes with a mask of 150 classes, the SceneParse150 benchmark",
        kind="masks",
        tasks=("segmentation",),
        needs="ADEChallengeData2016/{images,annotations}/{training,validation}/, objectInfo150.txt",
        source="http://sceneparsing.csail.mit.edu; Zhou et al. 2017",
        licence="research and education only; annotations BSD 3-clause",
        splits={
            "train": Known(rows=19_704, unconfirmed=_ROWS),
            "holdout": Known(rows=506, unconfirmed=_ROWS),
            "validation": Known(rows=2_000, unconfirmed=_ROWS),
        },
    ),
    "imagenet": DataSet(
        summary="ImageNet-1k: photographs of 1,000 classes",
        kind="labels",
        tasks=("classification",),
        needs="train/{wnid}/*.JPEG and val/{wnid}/*.JPEG, or train_imagenet-1k.yaml with its TSV files",
        source="https://image-net.org; Russakovsky et al. 2015, arXiv 1409.0575",
        licence="research and education only, by a form",
        splits={
            "train": Known(rows=1_268_355, unconfirmed=_ROWS),
            "holdout": Known(rows=12_812, unconfirmed=_ROWS),
            "val": Known(rows=50_000, unconfirmed=_ROWS),
        },
    ),
}
