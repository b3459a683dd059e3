"""Answer questions about models by plain functions that return records, one module per question. evennorm.cli prints
them."""
