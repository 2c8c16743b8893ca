"""For other libraries: their attention functions under their names, or what they need to call this package's. Each
module is named after theirs, and nothing imports it but the program that wants it; sdpa, also by
`flash_attn_ext.sdpa`."""
