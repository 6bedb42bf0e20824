"""Words of texts."""

from cola_train.evaluation.writing.words import words


def test_words_are_lower_case_letters_with_inner_apostrophes() -> None:
    assert words(" Don't _stop_, Mr. O'Neill: 3 cafés!") == [
        "don't",
        "stop",
        "mr",
        "o'neill",
        "cafés",
    ]


def test_words_that_an_edge_may_have_cut_are_left_out() -> None:
    assert words("ing the cat sat. No") == ["the", "cat", "sat"]
    assert words(" the cat.") == ["the", "cat"]
