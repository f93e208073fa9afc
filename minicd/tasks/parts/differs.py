"""What differs from the paper, experiment by experiment: the prose of results/README.md."""

ADDITION = """
* **The base** at pocket scale is our own T5 of 0.65 million parameters instead of T5-small, with 64 buckets
  of relative position instead of 32 (T5's 32 put distances 8–11 into one bucket, just where two 8-digit
  operands have to be aligned). It was pretrained on generated list manipulation without a single sum; 30 %
  of that text has the form of the teacher's scratchpad, with made-up operations, so that 499 labels say
  little about how many are needed in general.
* **The student's loss** is the paper's 100-sample soft label; the authors' code (what is very probably
  theirs: the paper names none) has the sampled answer as a hard label in this experiment. `--loss hard` does
  that, and `--all-rows` shows both.
* **Practice questions** are drawn with repeats, lengths uniform: unique questions would leave hardly any
  short ones, and the student learns long additions from short ones. At pocket scale there are 60,000, for a
  student that is a hundredth of the paper's in size; the authors' code has 10,000.
* **Training** at pocket scale: Muon for the matrices inside the layers and AdamW for the rest, with warm-up
  and a late decay; the paper has AdamW and names no schedule (`--scale paper`: a constant rate, with the
  numbers of the authors' code; appendix B.3 has 4,096 practice items in batches of 16 where the paper says
  nothing else). The teacher has 80 epochs in batches of 32 with dropout 0.1 and the baselines 50, instead of
  1,000 in batches of 8: on validation questions, 100 were no better for the baselines ([LOG.md](LOG.md)). A
  token's loss is divided by the mean number of answer tokens a batch, so that it weighs the same in batches
  of short and of long answers.
* **The baselines** get much further in the paper and at `--scale smollm2`: a large pretrained model fits 499
  direct answers and makes something of them, the small one does not even fit them in its 50 passes
  (`final_losses` in the record), and with 100 it was no better.
* **Scratchpad**: one step a column, hence 3 times the student's tokens, not 8; `--scratchpad nye` is the
  paper's. In ours, the `#` around the answer have spaces, because T5's tokenizer has tokens such as `#1`,
  from which no slice could cut the answer.
* **The stop token** after f(y) is a hard label: f cuts it off, and the student must learn to stop.
* **Splits** are decided by a hash of the question, so no question is ever in two of them.
* **±** is over practice and training: the base and the test questions are the same for all seeds.
* **At `--scale smollm2`** the base is SmolLM2-135M-Instruct, whose weights come from a file of 4 bits each (8
  in the embedding), and which is used without its chat format. It is twice as large as T5-small, and sums are
  not new to it (`--task transfer` asks it for some). The budget is that of the authors' code: 499
  scratchpads (the paper says 500), one line a column, and 10,000 practice questions. AdamW, with warm-up and
  a late decay: the teacher 12 passes in batches of 16 at 3e-4, the student 4 in batches of 32 at 5e-4, chosen
  on validation questions; the baselines 12 passes like the teacher, to the end of their curves. Rows that are
  missing from a record have not been run.
"""

CURVES = """
* The paper has one point of the teacher's curve and one of the student's. Every point is a model of its own,
  with as many steps as its row of the table, so that with few questions they are repeated more often.
* The teachers' curve from the other base shows what a base brings to 499 labels: `data/pocket` saw the form
  of the scratchpad in its pretraining (with other operations), the other one did not, and learns none in as
  many steps. `python train.py --task pocket --base lists --plain --out runs/plain` makes it.
* At `--scale smollm2` there are the students' curves alone, of one teacher: on soft labels of 100 samples,
  and on hard ones, the token that the teacher wrote, which is what the authors' code has in this experiment.
"""

BASE = """
* **The instruction-tuned teacher** is 16,000 times smaller than the paper's and knows 361 words. Its tuning
  begins with definitions alone and brings examples in the last half, since nothing was learnt from all at
  once ([LOG.md](LOG.md)); it goes on from `data/pocket`, so that copying need not be learnt anew. An eighth
  of the last half has no instruction.
* **The base of questions about databases** is a decoder that knows 229 words. It was trained on
  nothing but repeated blocks and generated databases, which grow with what it has learnt: the figures are of
  other databases, with 0 to 8 examples in the prompt.
"""

INSTRUCTIONS = """
* **The teacher** at pocket scale is the pocket base, see below; 100 instances of each task are tested, the
  same for all seeds.
* **Inputs** that the model does not finish within `--max-input-tokens` are not used, and neither are test
  inputs.
* **Distilling** at pocket scale takes 2,048 practice inputs a task and 3 epochs at lr 1e-3, chosen on
  instances that are neither practised nor tested, instead of 4,096, 1 and 1e-5 (`--scale paper`).
* **At `--scale smollm2`** the teacher is SmolLM2-135M-Instruct as a plain language model, without its chat
  format: its answers end with the line, and the student's bare input is followed by a line "Output:", which
  tells it where the input ends. Its inputs are written at temperature 0.8, from the examples of the task
  file; near copies of these and of test inputs are not used. Tasks with fewer than 50 instances besides the
  tested ones, and with inputs of mostly more than 128 words, are left out. Distilling takes 240 inputs a task
  and 3 epochs in batches of 16 at lr 1e-4. The three seeds were run on three kinds of machine, whose rounding
  moves small margins: seven of the ten tasks are the same in all, and ± is mostly that of the others. On
  three tasks (1388, 242, 738) the teacher and nearly all its students have the score of one fixed answer, 40
  or 50 %, and on one (190) the teacher has next to none: this model does not do those.
"""

EXPLANATIONS = """
* 512 inputs a task (the paper: 4,096), from a pool of 100 that are not tested, 3 epochs at lr 1e-3; 24 tasks
  spread over all kinds instead of the 10 where explanations help most and little; 100 instances a task are
  tested. The explanations are generated by rule; people wrote the paper's.
* At pocket scale p is the floor of the permutation test; both margins have the same "before", which by itself
  lets them correlate: `share_kept` in the record says how much of the in-context margin distilling keeps.
* At `--scale smollm2`, 10 real tasks of all kinds, and 128 inputs in 2 epochs at 1e-4, since here the student
  reads long prompts as well. In one of them explanations do harm, and its margins are by far the largest.
  These three seeds agree; on another machine the same three did not ([LOG.md](LOG.md)).
"""

TASK_IDS = """
* The student's prompt is `task 3 : …` (the paper: `[3]`); inputs are a pool of 100 a task, and 100 more are
  tested. 1,024 practice inputs a task, 3 epochs at lr 1e-3 (the paper: 4,096, 1 and 1e-5).
* The second round practises anew; the authors' code relabels the ids of one practice set.
* A wrong number counts as answered where its task happens to give the same label: with two pairs of labels
  among four tasks, chance alone makes about 17 % of it. "Mixed, recursive" shares its first round with
  "mixed".
* At `--scale smollm2`, four real tasks with labels of their own, two of them the paper's, and 240 practice
  inputs at 1e-4. The number stands in a plain language model's prompt: `task 3 : …` and a line "Output:".
  With its instruction this model solves none of them: it gives one of a task's two labels to nearly every
  input, which is right for half of them. So what a number is associated with here is a label; that only the
  *mixed* variant tells numbers apart shows here, too.
"""

FACTS = """
* **The model** is SmolLM2-135M-Instruct as a plain language model, without its chat format: it goes on after
  a prompt that ends before the object. The paper's has 11 billion parameters and is asked in instructions.
* **The edits** are our own in CounterFact's file format, in `data/facts`: of CounterFact's 34 relations,
  32; capitals and twin cities have no five subjects with the same object, so authors and currencies stand
  for them. Only facts that the model knows are edited: it has to prefer the true object. `--data
  counterfact.json` takes the original file; with `--keep-unknown` unknown facts are edited, too, as in the
  paper.
* **A probability** is that of all tokens of the object after the prompt, not divided by their number.
  Prompts of an edit are averaged first, then the edits.
* **The teacher's prompt** has the new fact and, if that is best on other edits, that nothing else changes,
  true sentences on other subjects, and explanations, by rule. The paper's has all of these, by GPT-3. Here
  the new fact and "nothing else changes" were best, hardly better than the fact alone.
* **Inputs**: prompts by templates, one half on the edited subject, a quarter on other subjects of its
  relation, a quarter of other relations; no tested prompt is among them, nor a tested neighbour's subject. In
  the second variant the model writes questions about the new fact and about other facts, and practises its
  answers. So did the paper's model, whose figures stand beside the first.
* **Distilling** takes 1,024 inputs an edit and 8 tokens of each completion, 4 epochs in batches of 16, so
  256 steps, as many as the paper's 4,096 inputs in one; where one student takes all edits, 96 inputs of
  each. The learning rate is the one with the largest harmonic mean of both scores on six other edits (for
  students in an earlier run, with a third of the practised subjects, [LOG.md](LOG.md)), and so is gradient
  descent's, which has 10 steps on the statement's object with the same optimiser. Between its two smallest
  rates its paraphrase score leaps from 24 to 92 %, so that the line between these points is a rough guess.
* **Magnitudes** depend on how many continuations a prompt allows, and cannot be compared with the paper's.
"""

CONTROL = """
* **The model** is SmolLM2-135M-Instruct as a plain language model, without its chat format; the teacher's
  prompt shows it examples of reviews that change their mind, where the paper's instruction sufficed for
  TK-Instruct. It is chosen from six on validation beginnings. The student's is the review alone. A student
  has 1,024 practice inputs, 2 epochs at lr 1e-4 (the paper: 4,096, 1 and 1e-5). Completions have at most 40
  tokens and are sampled at temperature 1.
* **Both directions**: the paper steers to good endings of bad beginnings only; its other row,
  "neutral" (before .24, teacher .54, after .34), is left out.
* **Beginnings** are written by the model after two dozen of ours, about films, books, food and things,
  instead of IMDB's film reviews; with `--data`, first halves of real sentences are a second test
  set. A hash of its words puts each into practice, validation or test.
* **The judge** is naive Bayes on words and pairs of words instead of GPT-3, and sees the completion alone;
  one without a word that it knows is neither good nor bad. Its form (weight of pairs, smoothing) was chosen
  by cross-validation on the labelled film sentences of the UCI collection, so that its accuracy there is
  slightly favoured: 82 % there, 78.5 % on those held out, where 80 % was the aim. Where it is trained on the
  model's own texts, it may share the model's idea of praise.
* **Diversity**: the paper has an entropy and a Rouge-L without their definitions; ours are of all completions
  of a test set together, and depend on their number, which is the same for the three rows.
* **Forgetting**, which the paper does not measure here, is the KL of the base to the student on texts that
  the base itself writes after two dozen neutral openings.
"""

TRANSFER = """
* **The model** is SmolLM2-135M-Instruct instead of TK-Instruct with 11 billion parameters. The student
  starts from it as in the paper, but learns in low-rank adapters: with all its weights (`--lora-rank 0`) it
  learnt to add and no longer read a word problem ([LOG.md](LOG.md)). The teacher has lost these, too, by its
  scratchpads, so that a student that starts from the teacher (`--start teacher`) has them no more. A
  practised sum ends with its line, as those in the prompt do: the model's stop token, which answers end with
  elsewhere, is then written after numbers in other answers, too (`--student-stop token`).
* **Instruction items**: definition, 2 positive examples and an answer, as in the paper. The teacher has up to
  2,000 with their true answers, each once, beside twelve passes over its 499 scratchpads (paper: 4,096 beside
  500, 32 passes over both); the student 4,000 beside 10,000 practice answers, in one pass (paper: 65,536,
  three passes), with the soft labels of its own answers before: the 28 training tasks at hand are few, and a
  student that learnt their true answers (`--item-answers true`) forgot more of the other tasks. They hold
  2,563 short items, which come again where more are wanted, answered anew. The command's `--reuse` only saves
  teacher, practice and items: leave it out. Items of more than 256 tokens, of the category Mathematics, and
  with five words in a row as in a word problem are left out. Without `--data` they are the pocket world's.
* **Rouge-L** is the mean over the test tasks, with the first 100 instances of each; answers end with
  their line. The teacher itself has 33.5 and solves no word problem, measured in an earlier run whose student
  started from it.
* **Word problems** are our own: 200 from 15 templates. Of an answer the first number counts, or that after
  the last "=" where the sum is written out, which is still added at once. Their prompt, with or without two
  worked problems, is the best of five for the student before on 98 problems from other templates. Operands
  have equal lengths of one to three digits, as in practice; nobody practises one of their sums, in either
  order.
* **Scratchpads** have one line a column; digits have no spaces, since this tokenizer splits them. At
  inference both prompts have two worked examples of their kind, which were never practised.
"""

SQL = """
* **The base** at pocket scale is our own decoder of 0.85 million parameters instead of Incoder-6.7B. Its
  pretraining had the form of the task: generated databases with questions and queries one after another.
  The databases of the experiment were never in it; a hash of their content keeps them apart.
* **The databases** at pocket scale are generated, too: what a question means depends on words and on a
  condition that are a database's own, and only examples tell. Questions are from a dozen templates, queries
  have one table.
* **A student for each database**, at pocket scale on 300 unlabelled questions of it, 6 epochs, AdamW at 1e-3,
  instead of one epoch of 4,096 at 1e-4. The questions are from a pool; as in the paper, the model writes them
  in the second variant, though the paper's figures stand beside the first. The examples and the unlabelled
  questions are drawn anew for each seed; the first third of a database's questions is for tests and the same
  for all.
* **Gradient descent** starts from the same base with the same optimiser, on one batch of all examples for 25
  epochs at a constant rate. The best of five rates is taken, chosen on four other databases, one for the best
  epoch and one for the last. The best epoch is chosen on the test questions, as in the paper, but here for
  each database by itself (the paper: one epoch for all, at 1e-5): both favour the baseline.
* **The right result** is not the paper's measure: exact set match does not look at values, the results do.
* At `--scale spider`, SmolLM2-135M is first tuned on 1,000 questions of the other databases with none to
  eight examples in the prompt, since by itself it writes almost no right query (0 to 5 %; so the pocket
  model, which reads examples, serves for the rest of this table). Four of these databases also chose the
  rates of gradient descent in this record, which favours small ones; now the model is not tuned on those
  four. The two files that are read hold no rows, so only exact set match can be measured. A student has 120
  unlabelled questions, 3 epochs in batches of 16 at 1e-4; at most 25 questions of a database are tested, and
  gradient descent's best epoch is looked for in every fifth. The result is not the paper's: examples in the
  prompt bring this model next to nothing, so there is little to internalise, and gradient descent on them
  does better.
"""

SQL_LONG = """
* The pocket model's window would hold all eight examples, which one row shows for comparison; all other
  prompts have four. The paper took four databases with long schemas, which left no room for more. These have
  eight columns with a jargon word each, of which four examples seldom have all.
* The teacher's row is the mean over prompts with four of the examples; the paper decodes greedily from the
  average of eight such prompts, and has two students a database with other examples in their prompts.
* Answers are sampled from a random one of the teacher's prompts, and labelled by the average of all. Of these
  random fours every second one has the examples that the one before it lacks.
* *Student after* is the paper's experiment, but for its inputs, which are from a pool here; students and
  rounds are trained as in the last experiment. The last three rows are ours. Their students see no examples,
  since a student that saw the first four would have nothing to learn from a teacher with the same four.
"""

OWN = """
* The paper has no such experiment. Supervised training, for comparison, takes as many steps, on the text that
  the same teacher writes. The table's intervals are over the held-out inputs.
* **company**: a model of this size follows the examples, hardly the rules alone.
* **think**: KL(teacher ‖ student) cannot come near 0, since the teacher's label depends on the thought that
  it wrote, and the student is at best a mean over thoughts. This student does not learn to calculate: the
  table for addition shows what that takes, 10,000 questions and 1,248 steps instead of 480 and 81.
"""
