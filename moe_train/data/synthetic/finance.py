"""Domain finance: quarterly results, market reports and letters of funds, with figures that agree with each other."""

from __future__ import annotations

from moe_train.data.synthetic.draw import Draw
from moe_train.data.synthetic.grammar import Writer, tenths
from moe_train.data.synthetic.people import WORDS as PEOPLE
from moe_train.data.synthetic.people import fix_people

WORDS = PEOPLE | {
    "root": (
        "Altair Brightwater Cobalt Driftwood Ember Foxglove Granite Halcyon Ironbridge Juniper Keystone Lantern "
        "Meridian Northgate Orchard Pinnacle Quarry Redwood Sterling Tidewater"
    ).split(),
    "form": ("Holdings", "Group", "Capital", "Industries", "Partners", "Trust", "Logistics", "Bank"),
    "sector": ("insurance", "shipping", "retail", "energy", "software", "mining", "telecommunications", "real estate"),
    "up": ("rose", "climbed", "advanced", "gained", "increased"),
    "down": ("fell", "declined", "slipped", "dropped", "retreated"),
    "driver": (
        "higher interest rates",
        "lower fuel prices",
        "a weaker currency",
        "cautious consumers",
        "new deposit accounts",
        "the sale of a subsidiary",
        "rising wages",
        "a one-off tax credit",
        "stronger exports",
        "larger loan losses",
    ),
    "asset": ("government bonds", "equities", "corporate debt", "commodities", "cash", "mortgage securities"),
    "measure": ("operating margin", "cash flow", "return on equity", "net debt", "credit quality", "liquidity ratio"),
    "mood": ("optimistic", "bearish", "bullish", "divided", "nervous", "confident"),
    "investor": ("pension funds", "retail investors", "hedge funds", "foreign lenders", "insurers", "market makers"),
    "rating": ("triple-A", "investment-grade", "speculative", "junk"),
    "verdict": ("hold", "buy", "sell", "accumulate", "reduce"),
    "quarter": ("first", "second", "third", "fourth"),
}

_COMMENTS = (
    "the {measure} improved on the back of {driver}.",
    "{chief_last} told shareholders in {city} that {chief_they} expected {driver} to weigh on the {measure}.",
    "analysts had been {mood} about the {sector} business of {company}.",
    "{investor} bought {asset} while {investor} sold them.",
    "the board of {company} will discuss the {measure} at its next meeting in {place}.",
    "a(n) {rating} rating keeps the cost of borrowing low, said {chief_last}.",
    "{driver} offset {driver}, so the dividend was left at {dividend} cents a share.",
    "because of {driver}, {company} moved part of its reserves into {asset}.",
    "{chief_last} bought shares of {company} with {chief_their} own savings.",
)
_MARKETS = (
    "traders were {mood} at the opening, and {investor} {up_or_down} their holdings of {asset}.",
    "yields on {asset} {up} by {points} basis points after news of {driver}.",
    "the price of {asset} {down} by {points} basis points in thin trading.",
    "{investor} called {asset} a hedge against {driver}.",
    "shares of {company} {up}, helped by {driver}.",
    "shares of {rival} {down}, and its {measure} came under scrutiny.",
    "brokers in {city} repeated their advice to {verdict} {company}.",
    "spreads of {rating} issuers widened, which hurt {investor}.",
    "the central bank said that {driver} would not change its view of the {measure} of lenders.",
)


def document(draw: Draw) -> str:
    writer = Writer(WORDS | {"up_or_down": ("raised", "trimmed", "doubled", "halved")}, draw)
    fix_people(writer, "chief")
    writer.fix_different("root", "root_one", "root_two")
    writer.fix(company="{root_one} {form}", rival="{root_two} {form}", sector="{sector}", place="{city}")
    writer.facts |= {"dividend": str(draw.between(2, 95)), "year": str(draw.between(1998, 2024))}
    return draw.pick((_results, _market, _letter))(writer)


def _results(writer: Writer) -> str:
    """Revenue, costs and profit: the change and the profit are those of the figures."""
    draw = writer.draw
    before, change = draw.between(200, 9000), draw.between(-150, 250)
    now = before + before * change // 1000
    costs = now * draw.between(60, 97) // 100
    direction = "{up}" if now > before else "{down}"
    percent = tenths(abs(now - before) * 1000 // before)
    writer.fix(quarter="{quarter}")
    writer.facts |= {
        "now": tenths(now),
        "before": tenths(before),
        "costs": tenths(costs),
        "profit": tenths(now - costs),
    }
    lines = [
        writer.sentence("{company} reports its {quarter} quarter of {year}"),
        writer.sentence(
            f"revenue of {{company}}, a(n) {{sector}} company based in {{place}}, {direction} by {percent} percent to "
            "{now} million dollars from {before} million dollars a year earlier. "
            "Costs were {costs} million dollars, which leaves an operating profit of {profit} million dollars."
        ),
        writer.paragraph(_COMMENTS, draw.between(3, 6)),
        writer.sentence(
            "{chief}, chief executive of {company}, said that {chief_they} was {mood} about the next quarter."
        ),
    ]
    return "\n\n".join(lines) + "\n"


def _market(writer: Writer) -> str:
    draw = writer.draw
    writer.facts["points"] = str(draw.between(2, 60))
    opening, change = draw.between(8000, 42000), draw.between(-900, 900)
    ended = f"opened at {tenths(opening)} points and closed at {tenths(opening + change)}"
    direction = "a gain" if change >= 0 else "a loss"
    return (
        "\n\n".join(
            [
                writer.sentence("market report from {place}"),
                writer.sentence(f"the {{sector}} index {ended}, {direction} of {tenths(abs(change))} points."),
                writer.paragraph(_MARKETS, draw.between(3, 6)),
                writer.paragraph(_COMMENTS, 2),
            ]
        )
        + "\n"
    )


def _letter(writer: Writer) -> str:
    """A portfolio whose parts add up to the whole."""
    draw = writer.draw
    parts = [draw.between(5, 200) for _ in range(3)]
    names = draw.some(WORDS["asset"], 3)
    listed = "\n".join(f"- {name}: {part} million dollars" for name, part in zip(names, parts, strict=True))
    writer.facts["points"] = str(draw.between(2, 60))
    return (
        "\n\n".join(
            [
                writer.fill("To the investors of the {root_one} fund, {place}, {year}"),
                f"The fund is worth {sum(parts)} million dollars:\n{listed}",
                writer.sentence(f"we think that {names[0]} will suffer from {{driver}}, and we {{verdict}} {{rival}}.")
                + " "
                + writer.paragraph(_MARKETS, draw.between(2, 5)),
                writer.fill("With regards, {chief}, manager of the fund"),
            ]
        )
        + "\n"
    )
