"""What an edit is measured by: answers, locality, averages over records; and MMEdit's variants."""
