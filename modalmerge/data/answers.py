"""Answers of visual question answering: how they are compared, which are the classes, what a model is to score.

Source: the official evaluator (github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py at commit
a013f00) for `normalise` and `official_accuracy`; the authors' conversion (write_vqa.py and glossary.py, as in ViLT) for
the vocabulary and the soft targets.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# the share of leave-one-out subsets in which 0, 1, 2, 3 or more equal answers of ten count fully, see official_accuracy
SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_WITH_COMMA = re.compile(r"\d,\d")
# the evaluator's pattern begins with (?!<=\d), a slip for "not after a digit" that is always true
_PERIOD = re.compile(r"\.(?!\d)")
# the evaluator gives re.UNICODE, which is 32, where `re.sub` takes how many to replace
_MOST_PERIODS = 32
_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_WITH_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()  # noqa: SIM905  # as a list it would take a hundred lines
# word that lacks one of its apostrophes -> the word. The evaluator's table has one entry the wrong way round, and four
# with a capital I that lower-cased words never are
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _WITH_APOSTROPHES
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalise(answer: str) -> str:
    """Bring an answer into the form in which the official evaluator compares answers.

    Punctuation marks (no apostrophe, colon or other) go: without a trace where a space is beside one like it anywhere
    in the answer, or where the answer has a comma between digits ("1,000"); else a space takes their place. Periods go
    unless a digit follows. Then lower case, single spaces, number words up to ten as digits ("none" as 0), no articles,
    apostrophes put back into contractions.

    A second pass changes nothing, unless there were more than 32 periods: so many go in one pass.

    Args:
        answer: what a person or a model answered; any text.

    Returns:
        The normalised answer; "" where nothing is left of it ("a", "?").

    Source:
        `processPunctuation` and `processDigitArticle` of the official evaluator, with their slips.
    """
    answer = _strip(answer)
    joined = _DIGITS_WITH_COMMA.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if joined or beside_space else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _strip(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def official_accuracy(answer: str, human: Sequence[str]) -> float:
    """Score one answer as the official evaluator does: leaving out each human answer in turn.

    Of the others, three equal ones make an answer fully right, fewer make it right by thirds; the mean over all that
    are left out is the score. With ten human answers, 0, 1, 2, 3 and more equal ones score 0, 0.3, 0.6, 0.9 and 1.

    Both sides are normalised where the human answers differ from each other. Where all are the same they are compared
    as they are: "2" is wrong if all ten wrote "two". The evaluator does so for the sake of text read off the image.

    Args:
        answer: the model's answer.
        human: the human answers as annotated, ten in VQAv2.

    Returns:
        In [0, 1].

    Raises:
        ValueError: there are fewer than two human answers.

    Source:
        `evaluate` of the official evaluator. Its versions of before a013f00, of which many copies are about, normalise
        the model's answer always, and of the human answers the punctuation only.
    """
    if len(human) < 2:
        raise ValueError(f"the accuracy of an answer needs at least 2 human answers (VQAv2 has 10), got {len(human)}")
    answer, human = _strip(answer), [_strip(other) for other in human]
    if len(set(human)) > 1:
        answer, human = normalise(answer), [normalise(other) for other in human]
    equal = human.count(answer)
    without_equal, without_other = min(1.0, (equal - 1) / 3), min(1.0, equal / 3)
    return (equal * without_equal + (len(human) - equal) * without_other) / len(human)


def build_vocabulary(multiple_choice_answers: Iterable[str], *, least: int = 9) -> tuple[str, ...]:
    """Choose the answers that a model answers with: the normalised ones that occur often enough.

    Args:
        multiple_choice_answers: the most frequent human answer of every question, training questions first, then those
            of val, each in the order of its file.
        least: how often an answer must occur, at least; 9 gives 3,129 answers on VQAv2.

    Returns:
        The answers by class, in the order in which they first occur. Another copy of the table may have another order,
        so a model keeps its own.
    """
    counts = Counter(map(normalise, multiple_choice_answers))
    return tuple(answer for answer, count in counts.items() if count >= least)


def soft_score(count: int) -> float:
    """Score an answer that `count` of ten people gave: 0, 0.3, 0.6, 0.9, and 1 from four on."""
    return SOFT_SCORES[min(count, len(SOFT_SCORES) - 1)]


def soft_targets(
    answers: Sequence[str], class_numbers: Mapping[str, int], *, normalised: bool = False
) -> Float[Tensor, " answers"]:
    """Score every class by how many people gave it as their answer.

    Args:
        answers: the human answers of one question as annotated, ten in VQAv2.
        class_numbers: answer to its class, 0 to their number less 1.
        normalised: normalise the human answers before they are looked up. False is what the authors do: a human "Two."
            is then lost although "2" is a class, and so are all ten answers to 307 training questions of VQAv2, which
            has 434,867 questions with an answer among the classes without normalising, 435,174 with it.

    Returns:
        float32, one score in [0, 1] for each class; all 0 where no answer is a class.
    """
    targets = torch.zeros(len(class_numbers))
    for answer, count in Counter(map(normalise, answers) if normalised else answers).items():
        if answer in class_numbers:
            targets[class_numbers[answer]] = soft_score(count)
    return targets
