def page(found): return "PAGE"
