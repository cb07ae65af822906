"""What a stage will need and how long it will take, before it runs: operations, memory, time and money."""
