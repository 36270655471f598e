"""What a run found, told from the files its stages left: tables for a terminal, one offline page for people."""
