"""Plain functions returning records, one module per question; printing lives in evennorm.cli."""
