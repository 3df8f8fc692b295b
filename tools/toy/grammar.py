"""The grammar of the toy dialogues: a caller, a nurse who asks for one danger sign, and where the caller is sent.

What an answer says follows from what was said (complaint, days, age, sign); how it is put is chosen at random.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from angelforge.tools.toy.complaints import COMPLAINTS, Complaint

Message = dict[str, str]

SYSTEM = "You are a nurse who decides how urgent a call is."
_TALK = (
    (("Hello", "Good morning", "Hi"), "Hello. Tell me what troubles you, for how long, and how old you are."),
    (("Thank you", "Thanks a lot", "Thank you very much"), "You are welcome. Call again if anything changes."),
    (
        ("What is triage?", "What do you do?", "What does triage mean?"),
        "Triage means to decide who needs help first. I ask what troubles you and for how long, I look for signs of "
        "danger, and then I say whether you need an ambulance, a doctor or rest.",
    ),
    (
        ("Are you a doctor?", "Are you a real doctor?", "Can you treat me?"),
        "No. I am a toy model that was trained on made-up calls. Please ask a doctor if you are ill.",
    ),
)
_AGES = tuple(range(2, 91))


def dialogue(rng: random.Random) -> list[Message]:
    """A random dialogue as chat messages; it ends with an answer."""
    messages = [_message("system", SYSTEM)] if rng.random() < 0.3 else []
    if rng.random() < 0.12:
        questions, answer = rng.choice(_TALK)
        return [*messages, _message("user", rng.choice(questions)), _message("assistant", answer)]
    return [*messages, *_call(rng)]


def _call(rng: random.Random) -> list[Message]:
    complaint, days, age, sign = rng.choice(COMPLAINTS), rng.randint(1, 21), rng.choice(_AGES), rng.random() < 0.4
    opening = _opening(rng, complaint, days, age)
    if rng.random() < 0.3:  # the caller tells the sign at once
        told = complaint.present if sign else complaint.absent
        messages = [_message("user", f"{opening} {_sentence(told)}")]
    else:
        messages = [
            _message("user", opening),
            _message("assistant", question(rng, complaint, days, age)),
            _message("user", reply(rng, complaint, sign)),
        ]
    messages.append(_message("assistant", advice(rng, complaint, days, age, sign)))
    if rng.random() < 0.2:
        questions, answer = _TALK[1]
        messages += [_message("user", rng.choice(questions)), _message("assistant", answer)]
    return messages


def question(rng: random.Random, complaint: Complaint, days: int, age: int) -> str:
    """What the nurse asks after the first message."""
    opening = rng.choice(("I am sorry to hear that.", "That must be hard.", "Thank you for telling me."))
    asking = rng.choice(("Please tell me one thing:", "I need to know one thing:", "One question:"))
    return (
        f"{opening} You are {age} years old and have had {complaint.name} for {_days(days)}. "
        f"{asking} do you notice that {complaint.sign}?"
    )


def reply(rng: random.Random, complaint: Complaint, sign: bool) -> str:
    """What the caller answers."""
    if sign:
        return f"{rng.choice(('Yes', 'Yes, I am afraid so', 'I think so'))}, {complaint.present}."
    return f"{rng.choice(('No', 'No, not at all', 'Luckily not'))}, {complaint.absent}."


def advice(rng: random.Random, complaint: Complaint, days: int, age: int, sign: bool) -> str:
    """Where the nurse sends the caller, and why: the rule of the whole grammar."""
    if sign:
        beginning = rng.choice(("This is an emergency.", "This cannot wait."))
        call = rng.choice(("Call an ambulance now", "Please call an ambulance at once"))
        company = rng.choice(("stay with someone until help comes", "keep your phone beside you"))
        return (
            f"{beginning} With {complaint.name} this sign can mean {complaint.cause}. "
            f"{call}, do not drive yourself, and {company}."
        )
    warning = f"call an ambulance if you notice that {complaint.sign}"
    urgent = _urgent(complaint, days, age)
    if urgent is None:
        first, second = rng.sample(complaint.care, 2)
        calming = rng.choice(("You can stay at home.", "There is no need to hurry."))
        return (
            f"{calming} The sign of {complaint.cause} is missing and {_days(days)} is not a long time. "
            f"Please {first} and {second}. See a doctor if it is not better in {_days(complaint.patience)}, "
            f"and {warning}."
        )
    meanwhile = rng.choice(("Until then", "In the meantime"))
    first, second = rng.sample(complaint.care, 2)
    return f"{urgent} {meanwhile} {first} and {second}. {_sentence(warning)}"


def _urgent(complaint: Complaint, days: int, age: int) -> str | None:
    """When to see a doctor and why; None: there is no need to."""
    if age < 6:
        return f"See a doctor today. A child of {age} years should not wait with {complaint.name}."
    if days > complaint.patience:
        when = "this week" if complaint.patience else "today"
        why = f"The sign of {complaint.cause} is missing, but {_days(days)} of {complaint.name} should be looked at."
        return f"See a doctor {when}. {why}"
    if age > 70:
        return f"See a doctor this week. At {age} years {complaint.name} should be looked at."
    return None


def _opening(rng: random.Random, complaint: Complaint, days: int, age: int) -> str:
    said, time = rng.choice(complaint.said), _days(days)
    return rng.choice(
        (
            f"{_sentence(said)} It began {time} ago. I am {age}.",
            f"I am {age} years old and {said}, for {time} now.",
            f"Hello, {said}. I have had it for {time}. I am {age} years old.",
            f"For {time} {said}. I am {age} years old.",
        )
    )


def _days(count: int) -> str:
    return "one day" if count == 1 else f"{count} days"


def _sentence(phrase: str) -> str:
    return f"{phrase[0].upper()}{phrase[1:]}."


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def texts(rng: random.Random) -> Iterator[str]:
    """Endless contents of random dialogues, and the names of the roles: what a tokenizer is to learn from."""
    while True:
        yield from ("SYSTEM", "HUMAN", "ASSISTANT")
        yield from (message["content"] for message in dialogue(rng))
