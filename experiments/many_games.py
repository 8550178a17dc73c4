"""headline.py with 1,600 training games instead of 400: the search and the report."""

from experiments import common, headline

if __name__ == "__main__":
    jobs = common.jobs_from_command_line(__doc__)
    headline.main("many_games", ["--data.train_size", "1600"], jobs)
