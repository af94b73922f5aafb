"""The sweep as a whole: machines, decisions, actors, and the loop that carries a plan out."""
