"""The tool that changes rules: which changes it makes, how it draws a part of them, and what it complains about."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutation.__main__ import RULES, all_mutants, chosen, listed, verdict
from tests.mutation.operators import mutants_of

SOURCE = """
def fee(qty: float, price: float) -> float:
    \"\"\"USD.\"\"\"
    if qty <= 0.0:
        return 0.0
    return max(qty * price, 1.0)


def compiled(function):
    return function if function is not None else None
"""


@pytest.fixture
def changes(tmp_path: Path) -> list[str]:
    path = tmp_path / "fees.py"
    path.write_text(SOURCE)
    return [mutant.key for mutant in mutants_of("trader_lib.rules.fees", path)]


def test_bounds_signs_factors_and_numbers_change_one_at_a_time(changes: list[str]) -> None:
    assert changes == [
        "rules.fees.fee: qty <= 0.0  =>  qty < 0.0",
        "rules.fees.fee: qty <= 0.0  =>  qty > 0.0",
        "rules.fees.fee: qty <= 0.0  =>  qty <= 1.0",
        "rules.fees.fee: return 0.0  =>  return 1.0",
        "rules.fees.fee: return max(qty * price, 1.0)  =>  return min(qty * price, 1.0)",
        "rules.fees.fee: return max(qty * price, 1.0)  =>  return max(qty / price, 1.0)",
        "rules.fees.fee: return max(qty * price, 1.0)  =>  return max(qty * price, 2.0)",
    ]


def test_changed_code_behaves_as_its_key_says(tmp_path: Path) -> None:
    path = tmp_path / "fees.py"
    path.write_text(SOURCE)
    names: dict[str, object] = {}
    exec(compile(ast.parse(SOURCE), "fees.py", "exec"), names)
    fee = names["fee"]
    assert fee(2.0, 3.0) == 6.0  # type: ignore[operator]
    divided = next(one for one in mutants_of("trader_lib.rules.fees", path) if "qty / price" in one.after)
    fee.__code__ = divided.code  # type: ignore[attr-defined]
    assert fee(6.0, 3.0) == 2.0  # type: ignore[operator]


def test_seed_draws_the_same_part_and_another_seed_another() -> None:
    mutants = list(all_mutants(["rules.wash", "rules.margin"]))
    drawn = chosen(mutants, 10, "a")
    assert len(drawn) == 10 and drawn == chosen(mutants, 10, "a") != chosen(mutants, 10, "b")
    assert chosen(mutants, None, "a") == chosen(mutants, 10_000, "a") == mutants


def test_what_is_listed_exists_and_has_a_reason() -> None:
    equivalent, triaged = listed()
    assert triaged <= set(RULES)
    assert set(equivalent) <= {mutant.key for mutant in all_mutants(RULES)}
    assert all(reason.strip() for reason in equivalent.values())


def test_survivor_without_a_reason_is_a_complaint_only_where_a_rule_is_triaged() -> None:
    mutants = list(all_mutants(["rules.wash"]))
    keys = [mutant.key for mutant in mutants]
    wrong, others = verdict(mutants, mutants[:1], keys)
    assert (len(wrong), others) == (1, []) and "survived" in wrong[0] and mutants[0].key in wrong[0]
    assert verdict(mutants, [], keys) == ([], [])


def test_listed_change_that_a_test_notices_is_out_of_date() -> None:
    equivalent, _ = listed()
    mutants = [mutant for mutant in all_mutants(["rules.folding"]) if mutant.key in equivalent]
    wrong, _ = verdict(mutants, mutants[1:], [mutant.key for mutant in all_mutants(["rules.folding"])])
    assert [text for text in wrong if "a test notices" in text and mutants[0].key in text] == wrong
