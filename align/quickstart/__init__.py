"""A small world with a known gold reward: film reviews in plain English.

`lexicon` holds its words, `prompts` what is asked, `reviews` who writes, `gold` what is right, `world` the tables.
Nothing in align imports this package: recipes reach it through the entry points of generators and scorers.
"""
