"""What differs from the paper, experiment by experiment: the prose of results/README.md."""

ADDITION = """
* **The base** at pocket scale is our own T5 of 0.65 million parameters instead of T5-small, with 64 buckets
  of relative position instead of 32 (T5's 32 put distances 8–11 into one bucket, just where two 8-digit
  operands have to be aligned). It was pretrained on generated list manipulation without a single sum; 30 %
  of that text has the form of the teacher's scratchpad, with made-up operations, so that 499 labels say
  little about how many are needed in general.
* **The student's loss** is the paper's 100-sample soft label; the authors' code seems to have used the
  sampled answer as a hard label in this experiment. `--loss hard` does that, and the table shows both.
* **Practice questions** are drawn with repeats, lengths uniform: unique questions would leave hardly any
  short ones, and the student learns long additions from short ones. There are 60,000 instead of 10,000, for
  a student that is a hundredth of the paper's in size.
* **Training**: Muon for the matrices inside the layers and AdamW for the rest, with warm-up and a late
  decay; the paper has AdamW with a constant rate (`--scale paper`). The teacher has 80 epochs in batches of
  32 and the baselines 50, instead of 1,000 in batches of 8: on validation questions, 100 were no better for
  the baselines ([LOG.md](LOG.md)).
* **The baselines** get much further in the paper: a pretrained T5-small makes something of 499 direct
  answers, this small model memorises them (`final_losses` in the record).
* **Scratchpad**: one step a column; `--scratchpad nye` is the paper's. In ours, the `#` around the answer
  have spaces, because T5's tokenizer has tokens such as `#1`, from which no slice could cut the answer.
* **The stop token** after f(y) is a hard label: f cuts it off, and the student must learn to stop.
* **Splits** are decided by a hash of the question, so no question is ever in two of them. One digit means 7
  test questions, a carry run of 8 means 15.
"""

BASE = """
* **The instruction-tuned teacher** is 17,000 times smaller than the paper's and knows 361 words. Its tuning
  begins with definitions alone and brings examples in the last half, since nothing was learnt from all at
  once ([LOG.md](LOG.md)); it goes on from `data/pocket`, so that copying need not be learnt anew. An eighth
  of the last half has no instruction.
"""

INSTRUCTIONS = """
* **The teacher** is the pocket base, see below; 100 instances of each task are tested.
* **Distilling** takes 1,024 practice inputs a task and 3 epochs at lr 1e-3, chosen on instances that are
  neither practised nor tested, instead of 4,096, 1 and 1e-5 (`--scale paper`).
"""

EXPLANATIONS = """
* 512 inputs a task, from a pool of 100 that are not tested, and 24 tasks spread over all kinds instead of
  10.
* p is the floor of the permutation test; both margins have the same "before", which by itself lets them
  correlate: `share_kept` in the record says how much of the in-context margin distilling keeps.
"""

TASK_IDS = """
* The student's prompt is `task 3 : …`, without the words "binary classification"; inputs are a pool of 100
  a task.
* The second round practises anew; the authors relabelled the ids of one practice set.
* A wrong number counts as answered where its task happens to give the same label: with two pairs of labels
  among four tasks, chance alone makes about 17 % of it. "Mixed, recursive" shares its first round with
  "mixed".
"""
