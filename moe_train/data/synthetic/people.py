"""Names that all domains share: what distinguishes the domains is their language, not who is in them."""

from __future__ import annotations

from moe_train.data.synthetic.grammar import Writer

SHE = ("Amara", "Bettina", "Carmen", "Dalia", "Edith", "Farah", "Greta", "Hanne", "Ines", "Jadwiga", "Keiko", "Leonie")
HE = (
    "Anton",
    "Bashir",
    "Casimir",
    "Dmitri",
    "Emeka",
    "Felipe",
    "Gustav",
    "Haruto",
    "Ismael",
    "Joris",
    "Kofi",
    "Lorenz",
)
FAMILY = (
    "Abernathy Bielski Castellan Dormer Eskola Fairweather Grondahl Hathersage Ivarsson Jellinek Kestrel Lindqvist "
    "Moravec Nakagawa Okonjo Pellerin Quintero Rosenfeld Szabo Thackeray Umarov Valdes Whitlock Yardley Zielinski"
).split()
CITIES = (
    "Antwerp Bergen Cordoba Dunedin Edmonton Fukuoka Ghent Hobart Izmir Jaipur Krakow Lisbon Montreal Nairobi Oslo "
    "Porto Quito Rotterdam Salzburg Tallinn Utrecht Valencia Wellington Yokohama Zurich"
).split()
WORDS = {"city": CITIES}


def fix_people(writer: Writer, *roles: str) -> None:
    """Fixes for each role `<role>` (full name), `<role>_first`, `<role>_last`, `<role>_they` and `<role>_their`
    (pronouns); no two share a name."""
    lasts = writer.draw.some(FAMILY, len(roles))
    firsts = writer.draw.some((*SHE, *HE), len(roles))
    for role, first, last in zip(roles, firsts, lasts, strict=True):
        they, their = ("she", "her") if first in SHE else ("he", "his")
        writer.facts |= {role: f"{first} {last}", f"{role}_first": first, f"{role}_last": last}
        writer.facts |= {f"{role}_they": they, f"{role}_their": their}
