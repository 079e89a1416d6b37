# %% [markdown]
# # A federation from a notebook
#
# Cells for Jupyter, VS Code or Spyder. From the repository's folder `python examples/notebook.py` runs all.
# Needs `mpifedlora data fetch 20newsgroups minilm` once, and matplotlib for the figure.

# %%
from mpifedlora import Callback, Federation, load_base_model

RUN_FILE = "examples/newsgroups.toml"
SETTINGS = {"federation.num_rounds": 6, "evaluation.max_examples": 200}

# %% [markdown]
# The configuration is checked here, before anything is trained: a wrong key raises, and says what to do.

# %%
federation = Federation(RUN_FILE, overrides=SETTINGS, out="runs/notebook/sa-fedlora")
print(federation.config.lora.rank_max, "to", federation.config.lora.rank_min)


# %% [markdown]
# A callback is told of each round, and may end the run after the round in hand.


# %%
class Table(Callback):
    """Print a line for each round; stop once the accuracy is good enough."""

    def on_start(self, run):
        self.run = run

    def on_round_end(self, row):
        print(f"round {row.round_num}: accuracy {row.eval_accuracy:.3f}, {row.uplink_bytes / 1e6:.1f} MB up")
        if row.eval_accuracy > 0.95:
            self.run.stop()


results = federation.run([Table()], overwrite=True, progress=False)

# %% [markdown]
# Another method on the same data and the same clients.

# %%
fixed = Federation(
    RUN_FILE, overrides={**SETTINGS, "federation.method": "fedit"}, out="runs/notebook/fedit"
).run(overwrite=True, progress=False)

# %% [markdown]
# Accuracy against the bytes that were sent, both directions.

# %%
import matplotlib.pyplot as plt  # noqa: E402

figure, axes = plt.subplots()
for name, result in (("sa-fedlora", results), ("fedit", fixed)):
    sent = (result.rounds["uplink_bytes"] + result.rounds["downlink_bytes"]).cumsum() / 1e6
    axes.plot(sent, result.rounds["eval_accuracy"], marker="o", label=name)
axes.set_xlabel("MB sent")
axes.set_ylabel("accuracy")
axes.legend()
figure.savefig("runs/notebook/accuracy.png")

# %% [markdown]
# The trained adapter, as PEFT loads it.

# %%
from peft import PeftModel  # noqa: E402

model = PeftModel.from_pretrained(
    load_base_model("runs/notebook/sa-fedlora"), "runs/notebook/sa-fedlora/adapter"
)
print(model.peft_config["default"].r, "is the adapter's rank")
