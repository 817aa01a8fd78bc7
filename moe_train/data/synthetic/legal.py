"""Domain legal: contracts, judgments and statutes, whose clauses refer to each other by the right numbers."""

from __future__ import annotations

from moe_train.data.synthetic.draw import Draw
from moe_train.data.synthetic.grammar import Writer
from moe_train.data.synthetic.people import WORDS as PEOPLE
from moe_train.data.synthetic.people import fix_people

WORDS = PEOPLE | {
    "agreement": ("Lease", "License Agreement", "Supply Contract", "Loan Agreement", "Deed of Settlement", "Charter"),
    "roles": ("Lessor/Lessee", "Licensor/Licensee", "Vendor/Purchaser", "Creditor/Debtor", "Principal/Agent"),
    "duty": (
        "indemnify the other party against claims of third persons",
        "keep the premises in good repair",
        "deliver written notice without undue delay",
        "render accounts at the end of each term",
        "refrain from assigning this instrument",
        "maintain confidentiality of all disclosures",
        "procure the consent of any mortgagee",
        "return the chattels free of encumbrance",
    ),
    "breach": ("default", "material breach", "misrepresentation", "insolvency", "wilful neglect", "force majeure"),
    "remedy": ("rescission", "damages", "specific performance", "an injunction", "forfeiture", "restitution"),
    "court": ("District Court", "Court of Appeal", "Magistrate", "Tribunal", "Chancery Division"),
    "claim": ("trespass", "negligence", "unjust enrichment", "nuisance", "breach of covenant", "defamation", "fraud"),
    "holding": ("affirmed", "reversed", "remanded", "vacated", "upheld"),
    "evidence": ("the affidavit", "the testimony", "an exhibit", "the deposition", "the ledger", "a sworn statement"),
    "doctrine": ("estoppel", "proximate cause", "good faith", "privity", "laches", "strict liability", "consideration"),
    "subject": (
        "waterways",
        "guardianship",
        "public markets",
        "animal husbandry",
        "copyright",
        "inheritance",
        "tenancy",
    ),
    "officer": ("registrar", "commissioner", "bailiff", "notary", "ombudsman"),
    "adverb": ("hereby", "thereafter", "forthwith", "notwithstanding the foregoing", "pursuant to law"),
    "modal": ("shall", "may", "must", "shall not"),
}

_ARGUMENTS = (
    "{plaintiff_last} pleaded {claim} and sought {remedy}.",
    "{defendant_last} denied {claim} and relied on {doctrine}.",
    "{evidence} was admitted over the objection of {defendant_last}.",
    "the court finds {evidence} credible, whereas {evidence} is not.",
    "the doctrine of {doctrine} bars {remedy} where there was {breach}.",
    "counsel for {plaintiff_last} argued that {defendant_they} had acted with {breach}.",
    "{plaintiff_last} failed to mitigate, and {plaintiff_their} damages are reduced accordingly.",
    "in {city}, the burden of proof of {claim} lies on the party that alleges it.",
    "the question of {doctrine} was not raised below and is waived.",
)
_PROVISIONS = (
    "no person may engage in {subject} without leave of the {officer}.",
    "the {officer} {modal} keep a register of {subject} in {city}.",
    "whoever commits {claim} in respect of {subject} is liable to {remedy}.",
    "an appeal against the {officer} lies to the {court}.",
    "this section does not apply in the event of {breach}.",
    "the {officer} may {adverb} require {evidence} to be produced.",
)


def document(draw: Draw) -> str:
    writer = Writer(WORDS, draw)
    fix_people(writer, "plaintiff", "defendant")
    writer.fix(forum="{city}")
    writer.facts |= {"year": str(draw.between(1952, 2024)), "number": str(draw.between(11, 999))}
    return draw.pick((_contract, _judgment, _statute))(writer)


def _contract(writer: Writer) -> str:
    draw = writer.draw
    writer.fix(agreement="{agreement}")
    one, two = draw.pick(WORDS["roles"]).split("/")
    writer.facts |= {"one": f"the {one}", "two": f"the {two}"}
    duties = draw.some(WORDS["duty"], draw.between(3, 6))
    clauses = [f"{{{draw.pick(('one', 'two'))}}} shall {draw.pick(('', '{adverb} '))}{duty}." for duty in duties]
    remedy = draw.between(1, len(clauses))
    clauses.append(
        f"upon {{breach}} under clause {remedy}, {{one}} is entitled to {{remedy}} within {draw.between(7, 90)} days."
    )
    clauses.append(f"clause {len(clauses)} survives the termination of this {{agreement}}.")
    clauses.append("this {agreement} is governed by the law of {forum}, and the {court} of {forum} has jurisdiction.")
    opening = (
        "This {agreement} is made in {year} between {plaintiff} of {forum}, hereinafter {one}, and {defendant} of "
        "{city}, hereinafter {two}. The parties {adverb} agree as follows:"
    )
    numbered = "\n".join(f"{index}. {writer.sentence(clause)}" for index, clause in enumerate(clauses, start=1))
    return f"{writer.fill(opening)}\n\n{numbered}\n\n{writer.fill('Signed: {plaintiff}, {defendant}')}\n"


def _judgment(writer: Writer) -> str:
    draw = writer.draw
    writer.fix(court="{court}", claim="{claim}")
    return (
        "\n\n".join(
            [
                writer.fill("{plaintiff_last} v. {defendant_last}, {court} of {forum}, No. {number} of {year}"),
                writer.sentence("{plaintiff} brought an action for {claim} against {defendant}.")
                + " "
                + writer.paragraph(_ARGUMENTS, draw.between(3, 7)),
                writer.sentence(
                    "for these reasons the judgment below is {holding}, and {remedy} is ordered. It is so ordered."
                ),
            ]
        )
        + "\n"
    )


def _statute(writer: Writer) -> str:
    draw = writer.draw
    writer.fix(subject="{subject}", officer="{officer}")
    provisions = draw.some(_PROVISIONS, draw.between(3, len(_PROVISIONS)))
    sections = [f"Section {index}. {writer.sentence(pattern)}" for index, pattern in enumerate(provisions, start=1)]
    reference = draw.between(1, len(sections))
    sections.append(
        f"Section {len(sections) + 1}. "
        + writer.sentence(
            f"a contravention of section {reference} is punished by {{remedy}}, unless {{evidence}} shows {{doctrine}}."
        )
    )
    title = writer.fill("An Act concerning {subject}, No. {number} of {year}")
    return title + "\n\n" + "\n".join(sections) + "\n"
