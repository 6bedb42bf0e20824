"""What a model is shown of a sample: the released evaluation's templates, whose examples are the
same for every sample.
"""

from cola_train.evaluation.benchmarks.scoring import letter
from cola_train.evaluation.benchmarks.tasks import Sample, check_task

_EXAMPLES = {
    "squad": """\
Context: The Normans (Norman: Nourmands; French: Normands; Latin: Normanni) were the people who in the 10th and 11th centuries \
gave their name to Normandy, a region in France. \
They were descended from Norse raiders and pirates from Denmark, Iceland and Norway.
Question: In what country is Normandy located?
Answer: France

""",
    "obqa": """\
Question: Which tool is best for tightening a screw?
(A) spoon
(B) hammer
(C) screwdriver
(D) paintbrush
Answer: screwdriver

Question: What do plants absorb from the air during photosynthesis?
(A) carbon dioxide
(B) oxygen
(C) helium
(D) salt
Answer: carbon dioxide

""",
    "mmlu": """\
Question: Which gas do plants absorb from the air during photosynthesis?
(A) Oxygen
(B) Carbon dioxide
(C) Nitrogen
(D) Hydrogen
Answer: Carbon dioxide

Question: A triangle has angles 50 degrees and 60 degrees. What is the third angle?
(A) 60 degrees
(B) 70 degrees
(C) 80 degrees
(D) 90 degrees
Answer: 70 degrees

""",
    "hellaswag": """\
Context: The girl puts the bread into the toaster and pushes the lever down. The bread
(A) becomes a slice of pizza.
(B) starts to toast and turn brown.
(C) disappears immediately.
(D) turns into a glass of water.
Answer: starts to toast and turn brown.

Context: The goalkeeper sees the ball coming towards the net. He dives and
(A) catches the ball with his hands.
(B) starts dancing in the field.
(C) opens a laptop to check email.
(D) runs away from the stadium.
Answer: catches the ball with his hands.

""",
    "race": """\
Read the following article and answer the question.

Article: Mary went to the store to buy some fruits. She bought five apples and two oranges. She paid 5 dollars in total. What did \
Mary buy?
Options:
(A) Bananas
(B) Apples and oranges
(C) Grapes
(D) Watermelon
Answer: Apples and oranges

""",
    "siqa": """\
Question: Jordan wanted to tell a joke to his friends. What does Jordan need to do before this?
(A) ignore his friends
(B) think of a funny story
(C) leave the room
Answer: think of a funny story

Question: Kai helped his neighbor carry heavy groceries inside. How would the neighbor feel?
(A) angry
(B) grateful
(C) scared
Answer: grateful

""",
    "story_cloze": """\
Story: I wanted to make an omelet. I cracked two eggs into a bowl and whisked them. Then I poured them into a hot pan.
(A) I ate a delicious omelet for breakfast.
(B) I decided to order a pizza instead.
End: I ate a delicious omelet for breakfast.

Story: The runner tied his shoes tight. He sprinted as fast as he could during the race. He crossed the finish line first.
(A) He was sad that he lost the race.
(B) He won the gold medal.
End: He won the gold medal.

""",
}


_ASKED = {
    "lambada": "{question}",
    "squad": "Context: {context}\nQuestion: {question}\nAnswer:",
    "hellaswag": "Context: {question}\n{options}\nAnswer:",
    "race": "Article: {question}\nOptions:\n{options}\nAnswer:",
    "story_cloze": "Story: {question}\n{options}\nEnd:",
    **dict.fromkeys(("mmlu", "obqa", "siqa"), "Question: {question}\n{options}\nAnswer:"),
}


def build_prompt(task: str, sample: Sample) -> str:
    """The text that the answer continues, without a space at its end; the sample's fields stand in
    it as they are.

    Raises:
        UserError: an unknown task.
    """
    check_task(task)
    options = "\n".join(f"({letter(i)}) {choice}" for i, choice in enumerate(sample.choices))
    fields = {"context": sample.context, "question": sample.question, "options": options}
    return _EXAMPLES.get(task, "") + _ASKED[task].format(**fields)
