//! Dirty sets, union, page hashing, comparison and staged transfer.
