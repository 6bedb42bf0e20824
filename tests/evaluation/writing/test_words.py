"""Known words."""

from cola_train.evaluation.writing.words import known_word_share, words


def test_words_are_lower_case_letters_with_inner_apostrophes() -> None:
    assert words("Don't _stop_, Mr. O'Neill: 3 cafés!", whole=True) == [
        "don't",
        "stop",
        "mr",
        "o'neill",
        "cafés",
    ]


def test_words_that_an_edge_may_have_cut_are_left_out() -> None:
    assert words("ing the cat sat. No") == ["the", "cat", "sat"]
    assert words(" the cat.") == ["the", "cat"]


def test_share_counts_occurrences_over_all_texts() -> None:
    assert known_word_share([" the blorp the.", " cat "], frozenset({"the", "cat"})) == (0.75, 4)
    assert known_word_share([""], frozenset({"the"})) == (0.0, 0)
