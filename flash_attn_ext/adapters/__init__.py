"""Other libraries' attention functions, under their names and with their signatures, on top of this package's. Each
module is named after theirs, and nothing imports it but the program that wants it; sdpa, also by
`flash_attn_ext.sdpa`."""
