"""Operations with a reference version and faster ones per device."""
