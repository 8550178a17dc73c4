"""headline.py with 1,600 training games instead of 400: the search, and a report of four seeds."""

from experiments import common, headline

if __name__ == "__main__":
    jobs = common.jobs_from_command_line(__doc__)
    setting = ["--data.train_size", "1600"]
    headline.main("many_games", setting, jobs, seeds=range(4), favor_hard=False)
