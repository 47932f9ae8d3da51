"""RecordIO: the bytes of a record, the headers of many, the .idx, and what the records are to a training set."""
