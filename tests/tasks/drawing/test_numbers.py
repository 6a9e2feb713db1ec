"""Numbers with their errors: one that does not exist is not 0."""

from tasks.drawing.numbers import counted, with_error


def test_a_number_that_rests_on_one_document_says_so() -> None:
    assert with_error(0.12345, 0.0206) == "0.123 ± 0.021"
    assert with_error(0.1, 0.00004, digits=6, sign="+") == "+0.100000 ± 0.000040"
    assert with_error(-0.1, None, sign="+") == "-0.100 ± none"
    assert (counted(1, "document"), counted(2048, "document")) == ("1 document", "2,048 documents")
