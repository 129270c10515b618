"""The table on the screen that a training run prints, a line an epoch.

train.py prints `table_head` once, and `table_line` of every record of its history.
"""

COLUMNS = {  # of the table on the screen: key -> (title, format)
    "epoch": ("epoch", "{:5d}"),
    "train_loss": ("loss", "{:7.3f}"),
    "dev_loss": ("dev loss", "{:8.3f}"),
    "top1_i2t": ("top1 i2t", "{:8.1f}"),
    "top1_t2i": ("t2i", "{:5.1f}"),
    "i2t_r1": ("i2t R@1", "{:7.1f}"),
    "i2t_r5": ("R@5", "{:5.1f}"),
    "i2t_r10": ("R@10", "{:5.1f}"),
    "i2t_medr": ("medr", "{:5.0f}"),
    "t2i_r1": ("t2i R@1", "{:7.1f}"),
    "t2i_r5": ("R@5", "{:5.1f}"),
    "t2i_r10": ("R@10", "{:5.1f}"),
    "t2i_medr": ("medr", "{:5.0f}"),
    "mean_recall": ("mean", "{:5.1f}"),
    "logit_scale": ("scale", "{:5.1f}"),
    "images_per_second": ("img/s", "{:6.0f}"),
    "seconds": ("s", "{:5.0f}"),
    "minutes": ("min", "{:6.1f}"),  # since the run began, its preparation included
}


def table_head() -> str:
    widths = {key: len(form.format(0)) for key, (_, form) in COLUMNS.items()}
    return " ".join(title.rjust(widths[key]) for key, (title, _) in COLUMNS.items())


def table_line(record: dict[str, float]) -> str:
    return " ".join(
        form.format(record[key]).rjust(len(title)) for key, (title, form) in COLUMNS.items()
    )
