"""Mathematics on operators that are known by their products: Hessians of losses, eigenpairs, low-rank sums."""
